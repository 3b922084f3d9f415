"""One file per piece of mathematics; each defines `Solver` classes (see `planish.core.Solver`)."""
