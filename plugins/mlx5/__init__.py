"""ConnectX and BlueField virtual functions whose firmware saves and restores them (mlx5)."""
