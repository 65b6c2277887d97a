"""``python -m chase_fx`` is the command ``chase-fx``."""

from chase_fx.cli import main

if __name__ == "__main__":
    main()
