"""Nothing lost, nothing twice, shown: a whole fleet under faults, and an audit of what it did."""
