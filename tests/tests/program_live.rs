//! Frames that are really sent: everybody on the road of the bench sends them, and they arrive.

use std::time::Duration;

use anyhow::Result;
use tests::{
    bench::{
        live::{Heat, Runner, Stadium},
        machine::stay_on_one_processor,
        rounds::Effort,
    },
    testbed::Testbed,
};

const EFFORT: Effort = Effort { rounds: 1, turn: Duration::from_millis(1) };
const ENTRIES: [(&str, u32); 2] = [("FLOWS_V4", 16_384), ("EMBRYOS_V4", 16_384)];

#[test]
fn what_is_sent_arrives_whoever_sends_it() -> Result<()> {
    stay_on_one_processor()?;
    let heats: Vec<Heat> = Heat::all(&[1]).into_iter().filter(|heat| !is_of_rules(*heat)).collect();
    let found = Testbed::with_entries(&ENTRIES)?.inside(|bed| {
        let mut stadium = Stadium::new(bed, &heats, &mut |_| ())?;
        stadium.measure(&heats, EFFORT, |_| ())
    })?;
    assert_eq!(found.len(), heats.len());
    for found in found {
        // A queue may run full on a machine that does something else, too.
        assert!(found.lost() < 100.0, "{}: {} of a thousand frames were lost", found.heat, found.lost());
        assert!(found.rate() > 0.0, "{}: {:?}", found.heat, found.turns);
    }
    Ok(())
}

/// Their programs are not everywhere.
fn is_of_rules(heat: Heat) -> bool {
    matches!(heat.runner, Runner::Rules(..))
}
