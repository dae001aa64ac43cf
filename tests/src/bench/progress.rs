//! Progress, on standard error.

use std::io::{IsTerminal as _, Write as _};

/// What is being done, in one line that the next one takes the place of.
pub fn tell(what: &str) {
    let mut terminal = std::io::stderr();
    let _ = if terminal.is_terminal() {
        write!(terminal, "\r\x1b[K{what}").and_then(|()| terminal.flush())
    } else if what.is_empty() {
        Ok(())
    } else {
        writeln!(terminal, "{what}")
    };
}
