//! What is in an image: layers on their way in, and an archive read back as a container runtime reads it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use serde_json::Value;
use tar::{Archive, Builder, EntryType, Header};
use xshell::{Shell, cmd};

use super::archive::{ENTRYPOINT, LAYER, MANIFEST, digest, path};
use crate::machine;

/// Programs of the image for debugging.
const TOOLS: [&str; 5] = ["busybox", "dash", "bpftool", "ip", "tc"];

/// A layer.
pub(super) struct Layer {
    pub(super) tar: Vec<u8>,
}

impl Layer {
    /// The agent alone.
    pub(super) fn of_agent(agent: &[u8]) -> Result<Self> {
        Ok(Self { tar: tar([(ENTRYPOINT.trim_start_matches('/'), 0o755, agent)])? })
    }

    /// Tools of this machine and their libraries, where they are here; a busybox is the rest of them, by links.
    pub(super) fn of_tools(shell: &Shell) -> Result<Self> {
        let mut files = BTreeMap::new();
        for tool in TOOLS {
            let program = machine::in_path(tool).with_context(|| format!("there is no {tool} in the path"))?;
            // It fails on static programs, and says nothing that matters.
            let listed = cmd!(shell, "ldd {program}").quiet().ignore_status().ignore_stderr().read()?;
            for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
                files.insert(library.trim_start_matches('/').to_owned(), fs::read(library)?);
            }
            files.insert(format!("bin/{tool}"), fs::read(program)?);
        }
        let mut layer = tar_builder(files.iter().map(|(path, bytes)| (path.as_str(), 0o755, bytes.as_slice())))?;
        let applets = cmd!(shell, "busybox --list").quiet().read()?;
        // Busybox's own shell would take its own `ip` for `ip`.
        let links = applets.lines().filter(|applet| !TOOLS.contains(applet) && *applet != "sh");
        for (link, target) in links.map(|applet| (applet, "busybox")).chain([("sh", "dash")]) {
            let mut header = header(0, 0o777);
            header.set_entry_type(EntryType::Symlink);
            layer.append_link(&mut header, format!("bin/{link}"), target)?;
        }
        Ok(Self { tar: layer.into_inner()? })
    }

    pub(super) fn compressed(&self) -> Result<Vec<u8>> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&self.tar)?;
        Ok(encoder.finish()?)
    }
}

fn header(size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(mode);
    // Of nobody's making, at no time: the same content is the same tar.
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn tar_builder<'a>(files: impl IntoIterator<Item = (&'a str, u32, &'a [u8])>) -> Result<Builder<Vec<u8>>> {
    let mut builder = Builder::new(Vec::new());
    for (path, mode, bytes) in files {
        builder.append_data(&mut header(bytes.len(), mode), path, bytes)?;
    }
    Ok(builder)
}

/// A tar of paths, modes and contents.
pub(super) fn tar<'a>(files: impl IntoIterator<Item = (&'a str, u32, &'a [u8])>) -> Result<Vec<u8>> {
    Ok(tar_builder(files)?.into_inner()?)
}

/// An image that was read back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    /// Everything in its layers, by path.
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// Reads an archive. Whatever does not have the digest or the size that it is named by is an error, and so is what
    /// nobody names.
    pub(super) fn read(archive: &[u8]) -> Result<Self> {
        let mut blobs = files(archive)?;
        let mut json = |path: &str| -> Result<Value> {
            Ok(serde_json::from_slice(&blobs.remove(path).with_context(|| format!("{path} is missing"))?)?)
        };
        ensure!(json("oci-layout")?["imageLayoutVersion"] == "1.0.0", "another layout");
        let index = json("index.json")?;
        let Some([named]) = index["manifests"].as_array().map(Vec::as_slice) else { bail!("not one manifest") };
        let manifest: Value = serde_json::from_slice(&blob(&mut blobs, named, MANIFEST)?)?;
        let config_type = manifest["config"]["mediaType"].as_str().unwrap_or_default().to_owned();
        let config: Value = serde_json::from_slice(&blob(&mut blobs, &manifest["config"], &config_type)?)?;
        ensure!(config["config"]["Entrypoint"] == serde_json::json!([ENTRYPOINT]), "it starts something else");
        let ids: Vec<Value> = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
        let layers = manifest["layers"].as_array().context("no layers")?;
        ensure!(ids.len() == layers.len(), "{} layers and {} names of what is in them", layers.len(), ids.len());
        let mut found = BTreeMap::new();
        for (layer, id) in layers.iter().zip(ids) {
            let mut tar = Vec::new();
            GzDecoder::new(blob(&mut blobs, layer, LAYER)?.as_slice()).read_to_end(&mut tar)?;
            ensure!(id == digest(&tar), "a layer is not what the configuration names");
            found.extend(files(&tar)?);
        }
        ensure!(blobs.is_empty(), "nobody names {:?}", blobs.keys());
        ensure!(found.contains_key(ENTRYPOINT.trim_start_matches('/')), "what it starts is not there");
        let name = named["annotations"]["io.containerd.image.name"].as_str().context("no name")?.to_owned();
        Ok(Self { name, labels: serde_json::from_value(config["config"]["Labels"].clone())?, files: found })
    }
}

fn blob(blobs: &mut BTreeMap<String, Vec<u8>>, named: &Value, media_type: &str) -> Result<Vec<u8>> {
    let name = named["digest"].as_str().context("a blob without a digest")?;
    ensure!(named["mediaType"] == media_type, "{name} is not {media_type}");
    let bytes = blobs.remove(&path(name)).with_context(|| format!("{name} is missing"))?;
    ensure!(digest(&bytes) == name, "{name} has another content");
    ensure!(named["size"] == bytes.len(), "{name} has another size");
    Ok(bytes)
}

/// The files of a tar. Each path is there once, and leads nowhere else.
fn files(tar: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let (mut files, mut paths) = (BTreeMap::new(), BTreeSet::new());
    for entry in Archive::new(tar).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_str().context("a path of letters")?.to_owned();
        ensure!(Path::new(&path).is_relative() && !path.contains(".."), "{path} leads elsewhere");
        ensure!(paths.insert(path.clone()), "{path} is there twice");
        if entry.header().entry_type().is_file() {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            files.insert(path, bytes);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::{Content, Layer};
    use crate::image::{
        archive::{Description, archive},
        binary::{self, tests::program},
    };

    fn image(agent: &[u8]) -> Vec<u8> {
        let description = Description::new("localhost/sluice", "1.2.3", Some("abc".into()));
        archive(&description, &[Layer::of_agent(agent).unwrap()]).unwrap()
    }

    #[test]
    fn an_archive_is_read_back_with_its_name_its_labels_and_one_static_program() {
        let agent = program(&[1, 2], 5);
        let content = Content::read(&image(&agent)).unwrap();
        assert_eq!(content.name, "localhost/sluice:1.2.3");
        assert_eq!(content.labels["org.opencontainers.image.version"], "1.2.3");
        assert_eq!(content.labels["org.opencontainers.image.revision"], "abc");
        assert_eq!(content.files.keys().collect::<Vec<_>>(), ["sluice"]);
        assert_eq!(content.files["sluice"], agent);
        assert_eq!(binary::dynamic(&content.files["sluice"]).unwrap(), Vec::<&str>::new());
    }

    #[test]
    fn the_same_agent_is_the_same_archive() {
        assert_eq!(image(b"one"), image(b"one"));
        assert_ne!(image(b"one"), image(b"two"));
    }

    #[test]
    fn a_file_of_a_later_layer_replaces_that_of_an_earlier_one() {
        let layers = ["one", "two"].map(|agent| Layer::of_agent(agent.as_bytes()).unwrap());
        let archive = archive(&Description::new("x", "1", None).for_debugging(), &layers).unwrap();
        let content = Content::read(&archive).unwrap();
        assert_eq!((content.name.as_str(), content.files["sluice"].as_slice()), ("x:1-debug", &b"two"[..]));
    }

    /// Of every fifth byte: a bit of any blob, of its name or its size.
    #[test]
    fn an_archive_with_a_wrong_bit_in_what_it_names_is_not_read() {
        let whole = image(b"an agent");
        let good = Content::read(&whole).unwrap();
        let mut refused = 0;
        for index in (0..whole.len()).step_by(5) {
            let mut broken = whole.clone();
            broken[index] ^= 1;
            // What tar fills up with, and owners and times, mean nothing.
            match Content::read(&broken) {
                Ok(content) => {
                    assert_eq!((&content.files, &content.labels), (&good.files, &good.labels), "byte {index}");
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 300, "{refused} of {} were refused", whole.len() / 5);
    }
}
