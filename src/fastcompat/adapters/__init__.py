"""fastcompat inside of other packages, a file each. Nothing else of fastcompat imports these, and they import their package.

"""
