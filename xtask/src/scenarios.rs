//! The table at the end of the scenarios suite: which of the forty have been shown, by which tests, and why not the others. In come
//! `tests/scenarios.yaml`, the sources of the tests and the lines that these print; out comes text.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::workspace::Workspace;

/// How many there are.
const COUNT: u8 = 40;

/// Where they are described, from the root of the repository.
const SCENARIOS: &str = "tests/scenarios.yaml";

/// The variable by which tests learn where to write what else there is to say.
pub(crate) const NOTES: &str = "SLUICE_SCENARIO_NOTES";

/// What the name of a test begins with; two digits and a low line follow.
const PREFIX: &str = "scenario_";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    number: u8,
    title: String,
    /// What its tests do not show, and why.
    limits: Option<String>,
    /// Why there is no test, or what shows it meanwhile.
    instead: Option<String>,
}

/// What came of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    result: String,
    name: String,
}

/// All scenarios, and what is known of each.
#[derive(Debug)]
pub(crate) struct Table {
    scenarios: Vec<Scenario>,
    /// Those that have tests.
    tested: BTreeSet<u8>,
    shown: BTreeMap<u8, Vec<Shown>>,
    /// A test whose result is on a line of its own, because it has printed something before.
    pending: Option<String>,
    notes: PathBuf,
}

impl Table {
    /// Nothing is shown yet.
    pub(crate) fn open(workspace: &Workspace) -> Result<Self> {
        let notes = workspace.target.join("scenario-notes");
        match fs::remove_file(&notes) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", notes.display()));
            }
            _ => {}
        }
        Self::of(&workspace.root, notes)
    }

    fn of(root: &Path, notes: PathBuf) -> Result<Self> {
        let text = fs::read_to_string(root.join(SCENARIOS)).with_context(|| format!("cannot read {SCENARIOS}"))?;
        let scenarios: Vec<Scenario> =
            serde_saphyr::from_str(&text).with_context(|| format!("{SCENARIOS} cannot be read"))?;
        let numbers = scenarios.iter().map(|scenario| scenario.number);
        ensure!(numbers.eq(1..=COUNT), "{SCENARIOS} must have 1 to {COUNT}, in order");
        let mut tested = BTreeSet::new();
        find_tests(&root.join("tests/tests"), &mut tested)?;
        Ok(Self { scenarios, tested, shown: BTreeMap::new(), pending: None, notes })
    }

    /// Where tests write what else there is to say.
    pub(crate) fn notes(&self) -> &Path {
        &self.notes
    }

    /// Takes in a line of a test program.
    pub(crate) fn read(&mut self, line: &str) {
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            self.pending = None;
            match result(rest) {
                Some(result) => self.show(name, &result),
                None => self.pending = Some(name.to_owned()),
            }
        } else if let Some(result) = result(line)
            && let Some(name) = self.pending.take()
        {
            self.show(&name, &result);
        }
    }

    fn show(&mut self, name: &str, result: &str) {
        // In a module, or by itself.
        let name = name.rsplit("::").next().unwrap_or(name);
        if let Some((number, rest)) = numbered(name) {
            let shown = Shown { result: result.to_owned(), name: rest.replace('_', " ") };
            self.shown.entry(number).or_default().push(shown);
        }
    }

    /// Scenarios of which nobody knows anything.
    pub(crate) fn missing(&self) -> Vec<u8> {
        let missing = self.scenarios.iter().filter(|scenario| scenario.instead.is_none());
        missing.map(|scenario| scenario.number).filter(|number| !self.tested.contains(number)).collect()
    }

    /// Result and explanation, a pair for each line.
    fn lines(&self, scenario: &Scenario, notes: &[(u8, String)]) -> Vec<(String, String)> {
        let mut lines: Vec<(String, String)> = match self.shown.get(&scenario.number) {
            Some(shown) => shown.iter().map(|shown| (shown.result.clone(), shown.name.clone())).collect(),
            None if self.tested.contains(&scenario.number) => vec![("not run".into(), String::new())],
            None => vec![("by".into(), scenario.instead.clone().unwrap_or_default())],
        };
        let own = notes.iter().filter(|(number, _)| *number == scenario.number);
        lines.extend(own.map(|(_, note)| (String::new(), format!("  {note}"))));
        if self.shown.contains_key(&scenario.number) {
            lines.extend(scenario.limits.iter().map(|limits| ("limits".into(), limits.clone())));
        }
        lines
    }

    fn read_notes(&self) -> Vec<(u8, String)> {
        let text = fs::read_to_string(&self.notes).unwrap_or_default();
        let note =
            |line: &str| line.split_once(' ').and_then(|(number, note)| Some((number.parse().ok()?, note.to_owned())));
        text.lines().filter_map(note).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notes = self.read_notes();
        let head = "scenario";
        let titles = self.scenarios.iter().map(|scenario| scenario.title.len());
        let width = titles.max().unwrap_or_default().max(head.len());
        writeln!(f, "no  {head:width$}  result   test, or why there is none")?;
        for scenario in &self.scenarios {
            let mut head = (format!("{:2}", scenario.number), scenario.title.as_str());
            for (result, text) in self.lines(scenario, &notes) {
                let (number, title) = &head;
                let line = format!("{number:2}  {title:width$}  {result:7}  {text}");
                writeln!(f, "{}", line.trim_end())?;
                head = (String::new(), "");
            }
        }
        let ran = self.shown.keys().filter(|number| **number <= COUNT).count();
        let failed = self.shown.values().filter(|shown| shown.iter().any(|shown| shown.result == "FAILED")).count();
        writeln!(f, "{ran} of {COUNT} scenarios ran, {failed} failed; {} have tests", self.tested.len())
    }
}

/// What libtest says of a test; ignored tests may say why.
fn result(words: &str) -> Option<String> {
    let words = words.trim();
    match words.split_once(',').map_or(words, |(first, _)| first) {
        "ok" => Some("passed".into()),
        "FAILED" => Some("FAILED".into()),
        "ignored" => Some("ignored".into()),
        _ => None,
    }
}

/// The number in the name of a test, and what follows.
fn numbered(name: &str) -> Option<(u8, &str)> {
    let (digits, rest) = name.strip_prefix(PREFIX)?.split_once('_')?;
    let is_number = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| digits.parse().ok().map(|number| (number, rest)))?
}

/// The numbers in the sources of the suite's tests.
fn find_tests(directory: &Path, numbers: &mut BTreeSet<u8>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_below = directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with("scenarios"));
        if !is_below && !name.starts_with("scenarios") {
            continue;
        }
        if path.is_dir() {
            find_tests(&path, numbers)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let found = text.match_indices(PREFIX).filter_map(|(at, _)| numbered(&text[at..]));
            numbers.extend(found.map(|(number, _)| number));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        Table::of(root, PathBuf::new()).unwrap()
    }

    fn scenario(number: u8, instead: Option<&str>) -> Scenario {
        Scenario { number, title: format!("title {number}"), limits: None, instead: instead.map(str::to_owned) }
    }

    #[test]
    fn each_of_the_forty_has_a_test_or_a_reason() {
        assert_eq!(table().missing(), [0; 0]);
    }

    #[test]
    fn a_scenario_with_neither_is_missing() {
        let mut table = table();
        table.scenarios = vec![scenario(1, None), scenario(2, Some("why")), scenario(3, None)];
        table.tested = [3].into();
        assert_eq!(table.missing(), [1]);
    }

    #[test]
    fn results_are_read_with_and_without_output_in_between() {
        let mut table = table();
        let output = "test scenario_11_a_b ... ok\n\
            test deep::scenario_12_c ... 100 kills\nsomething\nok\n\
            test scenario_11_d ... FAILED\ntest other ... ok\ntest scenario_12_e ... ignored, no module\n\
            test scenario_13_dies ... \nthread panicked\n";
        output.lines().for_each(|line| table.read(line));
        let shown = |number| {
            let shown: &[Shown] = &table.shown[&number];
            shown.iter().map(|shown| format!("{} {}", shown.result, shown.name)).collect::<Vec<_>>()
        };
        assert_eq!(shown(11), ["passed a b", "FAILED d"]);
        assert_eq!(shown(12), ["passed c", "ignored e"]);
        assert!(!table.shown.contains_key(&13));
    }

    #[test]
    fn a_row_has_its_results_its_notes_and_its_limits() {
        let directory = std::env::temp_dir().join(format!("scenario-notes-{}", std::process::id()));
        fs::write(&directory, "02 three cases\n03 another's\n").unwrap();
        let mut table = Table::of(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap(), directory.clone()).unwrap();
        table.scenarios =
            vec![scenario(1, Some("why")), Scenario { limits: Some("not all".into()), ..scenario(2, None) }];
        table.tested = [2].into();
        table.read("test scenario_02_a_b ... ok");
        let text = table.to_string();
        fs::remove_file(directory).unwrap();
        let expected = "no  scenario  result   test, or why there is none\n \
            1  title 1   by       why\n \
            2  title 2   passed   a b\n                         three cases\n              limits   not all\n\
            1 of 40 scenarios ran, 0 failed; 1 have tests\n";
        assert_eq!(text, expected);
    }
}
