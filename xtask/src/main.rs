//! The one door to building, testing and running Sluice.
fn main() {}
