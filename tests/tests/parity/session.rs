//! All cases in one lab: built when the first case asks for its outcome, gone when the last of them was asked.

use std::{
    collections::{BTreeMap, HashMap},
    sync::OnceLock,
};

use anyhow::{Context as _, Result};

use crate::{
    case::Case,
    change::Change,
    fixture::Fixture,
    ground::Ground,
    oracle::Settings,
    table::{SETTINGS, USUAL},
};

/// What became of a case, or why not.
type Outcome = Result<(), String>;

/// The cases that were asked for.
pub(crate) struct Session {
    services: Vec<Fixture>,
    cases: Vec<Case>,
    changes: Vec<Change>,
    outcomes: OnceLock<HashMap<String, Outcome>>,
}

impl Session {
    pub(crate) fn new(services: Vec<Fixture>, cases: Vec<Case>, changes: Vec<Change>) -> Self {
        Self { services, cases, changes, outcomes: OnceLock::new() }
    }

    /// The outcome of one. The first to ask waits for all. Without a lab there is none, and the program ends.
    pub(crate) fn outcome(&self, name: &str) -> Outcome {
        let outcomes = self.outcomes.get_or_init(|| {
            self.run().unwrap_or_else(|error| {
                eprintln!("no case was decided: {error:#}");
                std::process::exit(1);
            })
        });
        outcomes.get(name).cloned().unwrap_or_else(|| Err("it was not asked".to_owned()))
    }

    fn run(&self) -> Result<HashMap<String, Outcome>> {
        let mut ground = Ground::new(&self.services)?;
        let mut outcomes = HashMap::new();
        for settings in SETTINGS {
            let cases: Vec<_> = self.cases.iter().filter(|case| case.settings == settings).collect();
            let changes = if settings == USUAL { self.changes.as_slice() } else { &[] };
            if !cases.is_empty() || !changes.is_empty() {
                let context = || format!("with settings {:?}", settings.name);
                outcomes.extend(round(&mut ground, settings, &cases, changes).with_context(context)?);
            }
        }
        Ok(outcomes)
    }
}

/// What is asked while one agent after the other runs with the same settings.
fn round(
    ground: &mut Ground,
    settings: Settings,
    cases: &[&Case],
    changes: &[Change],
) -> Result<BTreeMap<String, Outcome>> {
    ground.start(settings)?;
    let findings = ground.ask(cases)?;
    let judged = cases.iter().zip(&findings).map(|(case, findings)| (case.name.clone(), case.judge(findings)));
    let mut outcomes: BTreeMap<_, _> = judged.collect();
    for change in changes {
        let outcome = (change.run)(ground).map_err(|error| format!("{error:#}"));
        outcomes.insert(change.name.to_owned(), outcome);
    }
    Ok(outcomes)
}
