"""A mixer that another package brings: a gated shift by one token, y = out(silu(gate) * (a * x[t] + b * x[t - 1]))."""
