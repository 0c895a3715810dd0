"""`python -m qwen_export`."""

from qwen_export.commands.cli import main

if __name__ == "__main__":
    main()
