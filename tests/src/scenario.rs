//! What a test of a scenario has to say besides whether it passed: how many cases, at what rate, what this machine could not show.
//! `cargo xtask test scenarios` prints it in its table.

use std::{env, fs::OpenOptions, io::Write as _};

/// The variable that names the file for it.
const NOTES: &str = "SLUICE_SCENARIO_NOTES";

/// Says something of a scenario, on one line.
pub fn note(number: u8, text: &str) {
    eprintln!("scenario {number}: {text}");
    let Some(path) = env::var_os(NOTES) else { return };
    let written = OpenOptions::new().create(true).append(true).open(&path).and_then(|mut notes| {
        let line = format!("{number:02} {}\n", text.replace('\n', " "));
        notes.write_all(line.as_bytes())
    });
    if let Err(error) = written {
        eprintln!("cannot write to {}: {error}", path.display());
    }
}
