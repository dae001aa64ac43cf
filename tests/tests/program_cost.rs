//! What a packet of a known connection costs beside the smallest honest balancer: the ratio of two programs that take turns on
//! one processor, which a slow machine does not change. `cargo xtask bench` measures it well.

use std::time::Duration;

use anyhow::Result;
use tests::{
    bench::{
        case::{Case, Kind},
        course::Course,
        rounds::{Effort, measure},
        yardstick::Place,
    },
    frame::Family,
    testbed::Testbed,
};

const EFFORT: Effort = Effort { rounds: 9, turn: Duration::from_millis(10) };

/// Found 0.65 to 0.7 in the driver and 0.8 to 0.95 at TC, where both leave checksums to the kernel.
const BOUNDS: [(Case, f64); 5] = [
    (KNOWN, 0.9),
    (Case { flows: 1, ..KNOWN }, 0.9),
    (Case { family: Family::V6, ..KNOWN }, 0.9),
    (Case { kind: Kind::Reply, ..KNOWN }, 1.0),
    (Case { place: Place::Tc, ..KNOWN }, 1.2),
];
/// Room for the flows of all cases.
const ENTRIES: [(&str, u32); 4] =
    [("FLOWS_V4", 16_384), ("FLOWS_V6", 16_384), ("EMBRYOS_V4", 16_384), ("EMBRYOS_V6", 16_384)];
const KNOWN: Case = Case::new(Kind::Established, 1_000);

#[test]
fn a_known_flow_costs_less_than_the_smallest_honest_balancer_takes() -> Result<()> {
    let figures = Testbed::with_entries(&ENTRIES)?.inside(|bed| {
        let mut course = Course::new(bed)?;
        measure(&mut course, &BOUNDS.map(|(case, _)| case), EFFORT, |_| {})
    })?;
    for (case, bound) in BOUNDS {
        let figures = figures.iter().find(|figures| figures.case == case).expect("every case was measured");
        println!("{case}: {:.2} of the floor", figures.ratio());
        assert!(
            figures.ratio() <= bound,
            "{case}: {:.2} of the floor, the bound is {bound}: {figures:?}",
            figures.ratio()
        );
    }
    Ok(())
}
