//! Services behave as kube-proxy's: every row of the specification on real sockets.
//!
//! A row is a client, a destination, policies, states of endpoints, a family and a protocol; an oracle says which backends
//! answer and whom they see, or that the client is refused or left to time out. Each row is a test by the name that the
//! row has (`pod client-a → NodePort of node-a, eTP=Local, b1 ready, IPv6 UDP`); all of them are asked at once in one lab.

mod case;
mod change;
mod fixture;
mod ground;
mod literal;
mod oracle;
mod session;
mod table;

use std::{collections::BTreeSet, process::ExitCode, sync::Arc};

use libtest_mimic::{Arguments, Failed, Trial};
use session::Session;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let by_hand = literal::cases();
    let mut trials: Vec<_> = by_hand
        .iter()
        .map(|(case, said)| {
            let (expected, said) = (case.expected().clone(), said.clone());
            Trial::test(format!("the oracle agrees {}", case.name), move || agreement(&expected, &said))
        })
        .collect();
    let mut cases = table::cases();
    cases.extend(by_hand.into_iter().map(|(case, _)| case));
    let mut changes = change::changes();
    let names = cases.iter().map(|case| case.name.clone()).chain(changes.iter().map(|change| change.name.to_owned()));
    let names: Vec<String> = names.collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "two cases have one name");

    cases.retain(|case| is_chosen(&arguments, &case.name));
    changes.retain(|change| is_chosen(&arguments, change.name));
    let session = Arc::new(Session::new(table::fixtures(), cases, changes));
    trials.extend(names.into_iter().map(|name| {
        let session = Arc::clone(&session);
        Trial::test(name.clone(), move || session.outcome(&name).map_err(Failed::from))
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The same choice that the library makes, made before anything is asked.
fn is_chosen(arguments: &Arguments, name: &str) -> bool {
    let matches = |pattern: &String| if arguments.exact { name == pattern } else { name.contains(pattern) };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

fn agreement(expected: &oracle::Expected, said: &oracle::Expected) -> Result<(), Failed> {
    if expected == said {
        return Ok(());
    }
    Err(format!("written: {expected}\noracle:  {said}").into())
}
