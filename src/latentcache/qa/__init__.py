"""Quality assurance: a sample of rows, decoded and compared with their images."""
