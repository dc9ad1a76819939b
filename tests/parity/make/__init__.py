"""Scripts that write golden files with packages of PyPI; each runs on its own, where these are installed.

pip install anomalib==2.7.0 FrEIA==0.2 scikit-learn beartype
python -m tests.parity.make.fastflow
"""
