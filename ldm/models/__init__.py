"""Networks: a config dataclass beside a builder of the real module."""
