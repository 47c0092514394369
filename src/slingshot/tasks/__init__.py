"""Problems, their verifiers and worked solutions, rewards, and the sandbox that runs other people's code. No torch."""
