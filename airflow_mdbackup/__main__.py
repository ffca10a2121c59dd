"""`python -m airflow_mdbackup ...`"""

import sys

from airflow_mdbackup.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
