"""Distillation of detectors, as a project outside Detectron2 that patches nothing of it."""
