//! What a look-up and a new entry cost in the set-associative table and in the kernel's LRU map, in one run, round by round in turn:
//! `cargo run -p tests --bin lookups`, as root. Nanoseconds, without those of taking the next key.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use tests::probe::{Probe, pin, repeat};

/// Buckets, and four times as many entries in the LRU map: both tables are half full with the most keys.
const BUCKETS: u32 = 32_768;
const MOST: u32 = 65_536;
const ROUNDS: usize = 5;

#[expect(clippy::print_stdout, reason = "it is what it is for")]
fn main() -> Result<ExitCode> {
    pin(0)?;
    println!("{:<8}{:>8}{:>8}{:>8}{:>8}", "", "keys", "LRU", "table", "ratio");
    for family in ["v4", "v6"] {
        for keys in [1, 1_000, MOST] {
            row(&format!("find {family}"), keys, cost(["nothing", "lru", "table"], family, keys, true)?);
        }
        row(&format!("new {family}"), MOST, cost(["nothing", "enter_lru", "enter_table"], family, MOST, false)?);
    }
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::print_stdout, reason = "it is what it is for")]
fn row(name: &str, keys: u32, [nothing, lru, table]: [Duration; 3]) {
    let [lru, table] = [lru, table].map(|took| took.saturating_sub(nothing).as_nanos());
    println!("{name:<8}{keys:>8}{lru:>8}{table:>8}{:>7}%", table * 100 / lru.max(1));
}

/// Medians. Keys are found in another order than they were entered; new ones are other ones in each round.
fn cost(programs: [&str; 3], family: &str, keys: u32, are_found: bool) -> Result<[Duration; 3]> {
    let of_family = |name: &str| format!("{name}_{family}");
    let names: Vec<String> = programs.into_iter().chain(["enter_lru", "enter_table"]).map(of_family).collect();
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    let entering = [names[3], names[4]];
    names.sort_unstable();
    names.dedup();
    let mut probe = Probe::new(7, BUCKETS, BUCKETS * 4)?.with(&names)?;
    if are_found {
        for program in entering {
            probe.set_keys(&list(keys, 0, 1))?;
            repeat(probe.program(program)?, 64, keys)?;
        }
        probe.set_keys(&list(keys, 0, 40_503))?;
    } else {
        fill(&mut probe, entering)?;
    }
    let mut took = [const { Vec::new() }; 3];
    for round in 0..ROUNDS as u64 {
        for (took, program) in took.iter_mut().zip(programs) {
            if !are_found {
                probe.set_keys(&list(keys, 10 + round, 1))?;
            }
            let times = if are_found { 200_000 } else { keys };
            took.push(repeat(probe.program(&of_family(program))?, 64, times)?);
        }
    }
    Ok(took.map(|mut took| {
        took.sort_unstable();
        took[ROUNDS / 2]
    }))
}

/// Both tables get twice as many keys as they hold.
fn fill(probe: &mut Probe, entering: [&str; 2]) -> Result<()> {
    for part in 0..4 {
        for program in entering {
            probe.set_keys(&list(MOST, part, 1))?;
            repeat(probe.program(program)?, 64, MOST)?;
        }
    }
    Ok(())
}

/// So many keys of a set, every `step`th, an odd number, so that each comes once where their number is even.
fn list(count: u32, set: u64, step: u32) -> Vec<[u64; 5]> {
    let key = |number: u64| [1, 2, 3, 4, 5].map(|word: u64| mixed(set << 40 | number << 8 | word));
    (0..count).map(|number| key(u64::from(number.wrapping_mul(step) % count.max(1)))).collect()
}

/// splitmix64.
fn mixed(from: u64) -> u64 {
    let from = from.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let once = (from ^ from >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let twice = (once ^ once >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    twice ^ twice >> 31
}
