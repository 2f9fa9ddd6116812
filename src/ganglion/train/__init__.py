"""The recipe of the shipped policy: demonstrations, behaviour cloning with flow matching, closed-loop evaluation."""
