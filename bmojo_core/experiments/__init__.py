"""One file for each figure or table of the paper, and the engine that runs their sweeps.

``python -m bmojo_core.experiments.<id> --help`` says how; each run leaves a record in results/.
"""
