"""One step: the gradients of loss and penalty, and what is measured."""
