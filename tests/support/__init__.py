"""What several folders of tests share: cases and their truth, processes, and the programs that tests start."""
