"""What is known of the Neural Engine, as rules of `isthmus lint`. Core ML decides on the device what runs where: all are `likely`."""
