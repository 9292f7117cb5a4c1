"""One page a run: does it learn, is it stable, what has it learned, what does the network see.

Renders what a run's folder holds (``runs``), judges it by stated rules (``diagnosis``), and shows views, neighbours, a
map and attention where checkpoint and images are available (``seen``, ``learned``). It knows files and features, no
training. torch is imported only where a network is run.
"""
