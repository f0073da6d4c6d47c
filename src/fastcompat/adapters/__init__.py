"""fastcompat inside of other packages, a file each, which imports its package. Nothing of fastcompat imports these."""
