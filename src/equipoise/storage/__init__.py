"""Every file that equipoise writes: records of runs and inspections, checkpoints, caches."""
