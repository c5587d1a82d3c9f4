"""What is reported: sums over pixels or instances that merge over batches and processes.

Every file here is imported by its own name.
"""
