//! The programs and the model of the rules agree, packet by packet. `cargo xtask fuzz` goes on for as long as one likes.

use anyhow::Result;
use proxy_common::outcome::Outcome;
use tests::fuzz::{self, Until};

/// What chance does not reach: sockets, a full table, a context that cannot be written to, others that serve as well; and Services that are
/// dispatched or cross, which the tables at random do not have.
const ELSEWHERE: [Outcome; 11] = [
    Outcome::PassForeign,
    Outcome::DropHeld,
    Outcome::RefuseBind,
    Outcome::DropTableFull,
    Outcome::DropNotWritable,
    Outcome::Dispatched,
    Outcome::NotDispatched,
    Outcome::DropNotDispatched,
    Outcome::DropTooLong,
    Outcome::DropNotCrossed,
    Outcome::Returned,
];

#[test]
fn programs_and_model_agree_on_a_hundred_thousand_packets() -> Result<()> {
    let (summary, finding) = fuzz::run(20_260_801, Until::Packets(100_000), |_| {})?;
    println!("{summary}");
    if let Some(finding) = finding {
        anyhow::bail!("{finding}");
    }
    for outcome in Outcome::ALL {
        assert_eq!(summary.reached(outcome) == 0, ELSEWHERE.contains(&outcome), "{outcome:?} is reached by chance");
    }
    Ok(())
}
