"""The workbench on a Slurm cluster: profiles, batch scripts, submissions, the queue, what a job does when it is interrupted."""
