//! Kernel modules: where they are in a directory, what each depends on, and the order in which a set of them loads.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

/// A module by its name, with its content as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// The wanted modules and all they depend on, dependencies first. Those the directory lacks are passed over: they are
/// built in, or the kernel has them not.
pub(crate) fn closure(shell: &Shell, directory: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(directory, &mut files)?;
    let read = |name: &str| files.get(name).map(|path| content(shell, path)).transpose();
    let mut loaded = Vec::new();
    for name in wanted {
        add(&mut loaded, &normal(name), &read)?;
    }
    Ok(loaded)
}

fn add(loaded: &mut Vec<Module>, name: &str, read: &impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<()> {
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(content) = read(name)? else { return Ok(()) };
    for dependency in dependencies(&content) {
        add(loaded, &dependency, read)?;
    }
    loaded.push(Module { name: name.to_owned(), content });
    Ok(())
}

/// What the `depends=` string of a module's section `.modinfo` names.
fn dependencies(content: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = content.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = content[start + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(normal).collect()
}

/// Files are named with either of the two, the kernel knows only the underscore.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let file_name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some((name, _)) = file_name.split_once(".ko") {
            files.insert(normal(name), entry.path());
        }
    }
    Ok(())
}

fn content(shell: &Shell, path: &Path) -> Result<Vec<u8>> {
    let extension = path.extension().unwrap_or_default().to_string_lossy();
    let unpack = match extension.as_ref() {
        "ko" => return Ok(fs::read(path)?),
        "xz" => cmd!(shell, "xz --decompress --stdout {path}"),
        "zst" => cmd!(shell, "zstd --decompress --stdout --quiet {path}"),
        _ => bail!("{} is packed in an unknown way", path.display()),
    };
    Ok(unpack.quiet().output()?.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(wanted: &[&str], directory: &[(&str, &str)]) -> Vec<String> {
        let read = |name: &str| {
            let module = directory.iter().find(|(module, _)| *module == name);
            Ok(module.map(|(_, depends)| format!("\u{7f}ELF license=GPL\0depends={depends}\0intree=Y\0").into_bytes()))
        };
        let mut loaded = Vec::new();
        for name in wanted {
            add(&mut loaded, name, &read).unwrap();
        }
        loaded.into_iter().map(|module| module.name).collect()
    }

    #[test]
    fn dependencies_load_first_and_once() {
        let directory = [("vxlan", "udp_tunnel,ip6_udp_tunnel"), ("geneve", "udp_tunnel"), ("udp_tunnel", "")];
        let directory = [directory.as_slice(), &[("ip6_udp_tunnel", "")]].concat();
        assert_eq!(names(&["vxlan", "geneve"], &directory), ["udp_tunnel", "ip6_udp_tunnel", "vxlan", "geneve"]);
    }

    #[test]
    fn a_module_that_is_built_in_is_passed_over() {
        assert_eq!(names(&["veth", "dummy"], &[("dummy", "")]), ["dummy"]);
    }

    #[test]
    fn dependencies_are_named_as_the_kernel_names_them() {
        assert_eq!(dependencies(b"\0depends=x-tables,nf_tables\0"), ["x_tables", "nf_tables"]);
        assert!(dependencies(b"no such string").is_empty());
    }
}
