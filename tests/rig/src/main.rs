//! blixard-rig.
fn main() {}
