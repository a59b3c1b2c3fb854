"""From text to samples: tokenizers, readers of documents, preprocessing, and the data sets that training draws from."""
