"""The only place that knows PEFT's classes, devices and quantised bases."""
