"""How accurate is a detector, what does it cost, and where does it attend?"""
