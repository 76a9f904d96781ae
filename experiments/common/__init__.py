"""What recipes share: blocks of settings, the command line, and what builds a model, data, optimizer and update."""
