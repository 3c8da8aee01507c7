import sys

from rvlm.cli import main

sys.exit(main())
