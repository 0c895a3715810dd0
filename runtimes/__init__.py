"""The part that ships to the target machine: numpy and one backend."""
