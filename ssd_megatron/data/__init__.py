"""From text to samples: tokenizers, readers of documents, preprocessing, and the data sets that training draws from."""

import warnings

# megatron-core warns on import about every optional package that is missing; none of them concerns data.
warnings.filterwarnings("ignore", module="megatron")
