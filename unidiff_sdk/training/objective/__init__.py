"""What training minimizes: the joint model, its losses and which parameters are tuned."""
