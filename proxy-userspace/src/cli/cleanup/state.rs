//! What agents keep in their `--state-dir`, which goes with everything else: the next agent would take it for true.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    dataplane::{Cleaned, Kept, Removed},
    source::kubernetes,
    verify,
};

/// The chart's.
const USUAL: &str = "/var/lib/sluice";
/// The pin path of the agent whose it is.
pub(super) const USUAL_PINS: &str = "/sys/fs/bpf/sluice";

/// The directory that is meant. The usual one is not that of an agent that pins elsewhere.
pub(super) fn directory(given: Option<&Path>, pin_path: &Path) -> Option<PathBuf> {
    let usual = || (pin_path == Path::new(USUAL_PINS)).then(|| PathBuf::from(USUAL));
    given.map(Path::to_owned).or_else(usual)
}

/// What is there, and what is to be said of what stays. Files of others stay, and the directory with them.
pub(super) fn find(directory: &Path) -> (Vec<Removed>, Option<String>) {
    let [memory, draft] = kubernetes::MEMORY;
    let files = [memory, draft, verify::SOCKET].map(|name| directory.join(name));
    let Ok(entries) = fs::read_dir(directory) else { return (Vec::new(), None) };
    let entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let is_ours = entries.iter().all(|path| files.contains(path));
    let mut found: Vec<Removed> =
        files.into_iter().filter(|path| entries.contains(path)).map(|path| Removed::File { path }).collect();
    let is_mounted = is_mounted(directory);
    if is_ours && !is_mounted {
        found.push(Removed::Directory { path: directory.into() });
    }
    let stays = || {
        format!("directory {} is mounted here, and stays where that is from, without these files", directory.display())
    };
    let note = (is_ours && is_mounted && !found.is_empty()).then(stays);
    (found, note)
}

/// Removes what was found.
pub(super) fn remove(found: Vec<Removed>) -> Cleaned {
    let mut cleaned = Cleaned::default();
    for thing in found {
        let done = match &thing {
            // Not empty any more, or never without a file that could not be removed.
            Removed::Directory { .. } if !cleaned.kept.is_empty() => continue,
            Removed::Directory { path } => fs::remove_dir(path),
            Removed::File { path } => fs::remove_file(path),
            _ => continue,
        };
        match done {
            Ok(()) => cleaned.removed.push(thing),
            Err(error) => cleaned.kept.push(Kept { thing, reason: format!("{error}; remove it on the node") }),
        }
    }
    cleaned
}

/// A directory that a container was given cannot be removed from within.
fn is_mounted(directory: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|place| Path::new(place) == directory)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::{Removed, USUAL_PINS, directory, find, remove};

    #[test]
    fn the_usual_directory_belongs_to_the_usual_pins() {
        let usual = Path::new(USUAL_PINS);
        let cases = [
            ("usual pins", None, usual, Some("/var/lib/sluice")),
            ("other pins", None, Path::new("/sys/fs/bpf/other"), None),
            ("named", Some("/state"), usual, Some("/state")),
            ("named, with other pins", Some("/state"), Path::new("/sys/fs/bpf/other"), Some("/state")),
        ];
        for (name, given, pin_path, expected) in cases {
            assert_eq!(directory(given.map(Path::new), pin_path).as_deref(), expected.map(Path::new), "{name}");
        }
    }

    #[test]
    fn files_of_agents_go_and_those_of_others_stay() {
        let all = tempfile::tempdir().unwrap();
        let state = all.path().join("state");
        assert_eq!(find(&state), (Vec::new(), None), "it need not be there");
        fs::create_dir(&state).unwrap();
        let write = |name: &str| fs::write(state.join(name), "").unwrap();
        for name in ["kubernetes.json", ".kubernetes.json.new", "verify.sock", "theirs"] {
            write(name);
        }
        let (found, note) = find(&state);
        assert!(found.iter().all(|thing| matches!(thing, Removed::File { .. })) && note.is_none(), "{found:?}");
        assert_eq!(remove(found).removed.len(), 3);
        let left: Vec<_> = fs::read_dir(&state).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["theirs"]);
        fs::remove_file(state.join("theirs")).unwrap();
        write("verify.sock");
        let (found, _) = find(&state);
        assert_eq!(found.last(), Some(&Removed::Directory { path: state.clone() }));
        assert_eq!(remove(found.clone()).removed, found);
        assert!(!state.exists());
    }

    #[test]
    fn what_cannot_be_removed_is_told_and_the_rest_goes() {
        let all = tempfile::tempdir().unwrap();
        let state = all.path().join("state");
        // A directory is no file, whoever asks.
        fs::create_dir_all(state.join("kubernetes.json")).unwrap();
        fs::write(state.join("verify.sock"), "").unwrap();
        let cleaned = remove(find(&state).0);
        assert_eq!(cleaned.removed, [Removed::File { path: state.join("verify.sock") }]);
        let kept: Vec<_> = cleaned.kept.iter().map(|kept| &kept.thing).collect();
        assert_eq!(kept, [&Removed::File { path: state.join("kubernetes.json") }]);
    }
}
