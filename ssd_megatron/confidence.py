"""How sure a mean is that was measured on a sample."""

CONFIDENCE = 1.96  # standard errors on both sides of a mean for 95 %, of a normal distribution
