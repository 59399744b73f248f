"""How far two numbers may be apart, and why."""

# masked against removed, relative to the largest logit: the same products summed in another order in float64; 1e-17 to
# 1e-13 was seen, and the smallest true disagreement (a norm over one channel of 64) is 3e-8.
SAME_IN_FLOAT64 = 1e-10

# A closed form against autograd in float64: the same sum of a few hundred terms in another order.
CLOSED_FORM_FLOAT64 = 1e-12

# A closed form against float32: 2^-24 for each of at most a hundred roundings.
CLOSED_FORM_FLOAT32 = 1e-5

# A ratio written with four digits, rounded up.
NAMED_RATIO = 1e-4
