"""GPU kernels (Triton). Imports torch and triton only, never fastcompat; installed as `fastcompat.kernels`."""
