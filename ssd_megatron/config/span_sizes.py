"""How long the parts of a sample of span corruption are (T5, arXiv 1910.10683)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpanSizes:
    """Of one sample, in tokens.

    Attributes:
        text: tokens of text.
        noise: of them, in spans that are to be predicted.
        spans: their number; a sentinel stands for each.
    """

    text: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """What is left, sentinels, and the end."""
        return self.text - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Sentinels, each before its span, and the end."""
        return self.noise + self.spans + 1


def span_sizes(seq_length: int, fraction: float, mean_length: float) -> SpanSizes:
    """The most text whose inputs are at most `seq_length` tokens, which is at least 4. They are exactly as many, but
    where spans are many and short: then one token more of text may be two more of input."""
    text = 2
    while _sizes(text + 1, fraction, mean_length).inputs <= seq_length:
        text += 1
    return _sizes(text, fraction, mean_length)


def _sizes(text: int, fraction: float, mean_length: float) -> SpanSizes:
    noise = min(max(round(text * fraction), 1), text - 1)
    spans = min(max(round(noise / mean_length), 1), noise, text - noise)
    return SpanSizes(text, noise, spans)
