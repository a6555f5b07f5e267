//! OCI archives (image-spec 1.1): what BuildKit exports, read without Docker.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use object::elf;
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, Object};
use serde_json::Value;

/// The blobs of an archive or of a folder in the same layout, by digest, and its index.
pub struct Archive {
    pub index: Value,
    blobs: BTreeMap<String, Vec<u8>>,
}

/// An image for one platform.
pub struct Image {
    pub digest: String,
    pub manifest: Value,
    pub config: Value,
    /// What is in the layers: later ones replace files of earlier ones. Names begin without a slash.
    pub files: BTreeMap<String, File>,
    /// Bytes of all layers as they are pulled.
    pub compressed: u64,
    /// Bytes of files that a later layer replaces: pulled, and never seen.
    overwritten: u64,
}

#[derive(Clone)]
pub struct File {
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub kind: tar::EntryType,
    pub link: Option<String>,
    pub content: Vec<u8>,
    /// The layer that it comes from.
    pub layer: usize,
}

impl Archive {
    /// Reads an exported tar file.
    pub fn open(file: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut archive = tar::Archive::new(std::fs::File::open(file).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(name, content);
        }
        Self::of(files)
    }

    /// Reads a folder, such as a cache export.
    pub fn open_folder(folder: &Path) -> Self {
        let files = crate::support::warmdock::files_below(folder)
            .into_iter()
            .map(|path| {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                (name.to_owned(), std::fs::read(&path).unwrap())
            });
        Self::of(files.collect())
    }

    fn of(mut files: BTreeMap<String, Vec<u8>>) -> Self {
        let index = files.remove("index.json").expect("an index.json");
        let blobs = files
            .into_iter()
            .filter_map(|(name, content)| {
                let digest = name.strip_prefix("blobs/sha256/")?;
                Some((format!("sha256:{digest}"), content))
            })
            .collect();
        Self {
            index: serde_json::from_slice(&index).unwrap(),
            blobs,
        }
    }

    pub fn blob(&self, digest: &str) -> &[u8] {
        self.blobs
            .get(digest)
            .unwrap_or_else(|| panic!("no blob {digest}"))
    }

    fn json(&self, digest: &str) -> Value {
        serde_json::from_slice(self.blob(digest)).unwrap()
    }

    /// The descriptors of manifests, also those below an index of several platforms.
    pub fn manifests(&self) -> Vec<Value> {
        let mut found = Vec::new();
        let mut open: Vec<Value> = self.index["manifests"].as_array().unwrap().clone();
        while let Some(descriptor) = open.pop() {
            let kind = descriptor["mediaType"].as_str().unwrap_or_default();
            if kind.contains("index") || kind.contains("list") {
                let index = self.json(descriptor["digest"].as_str().unwrap());
                open.extend(index["manifests"].as_array().unwrap().iter().cloned());
            } else {
                found.push(descriptor);
            }
        }
        found
    }

    /// The image for an architecture of linux.
    #[track_caller]
    pub fn image(&self, architecture: &str) -> Image {
        let images = self.manifests().into_iter().filter_map(|descriptor| {
            let digest = descriptor["digest"].as_str().unwrap().to_owned();
            let manifest = self.json(&digest);
            let config = self.json(manifest["config"]["digest"].as_str()?);
            (config["architecture"] == architecture).then_some((digest, manifest, config))
        });
        let images: Vec<_> = images.collect();
        let [(digest, manifest, config)] = &images[..] else {
            panic!("{} images for {architecture}: {}", images.len(), self.index)
        };
        let layers = manifest["layers"].as_array().unwrap();
        let mut files = BTreeMap::new();
        let mut overwritten = 0;
        for (number, layer) in layers.iter().enumerate() {
            let blob = self.blob(layer["digest"].as_str().unwrap());
            overwritten += add_layer(&mut files, number, unpacked(blob));
        }
        Image {
            digest: digest.clone(),
            manifest: manifest.clone(),
            config: config.clone(),
            compressed: layers
                .iter()
                .map(|layer| layer["size"].as_u64().unwrap())
                .sum(),
            files,
            overwritten,
        }
    }

    /// Every blob and the index, unpacked where it is packed.
    pub fn contents(&self) -> impl Iterator<Item = (String, Vec<u8>)> {
        let index = ("index.json".to_owned(), self.index.to_string().into_bytes());
        let blobs = self.blobs.iter().map(|(digest, blob)| {
            let mut content = Vec::new();
            unpacked(blob).read_to_end(&mut content).unwrap();
            (digest.clone(), content)
        });
        std::iter::once(index).chain(blobs)
    }
}

fn unpacked(blob: &[u8]) -> Box<dyn Read + '_> {
    match blob {
        [0x1f, 0x8b, ..] => Box::new(GzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => panic!("a layer in zstd: expected gzip or a plain tar"),
        _ => Box::new(blob),
    }
}

/// Adds what is in a layer; gives the bytes of files that it replaces.
fn add_layer(files: &mut BTreeMap<String, File>, layer: usize, tar: impl Read) -> u64 {
    let mut overwritten = 0;
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let name = path.trim_start_matches("./").trim_end_matches('/');
        let base = name.rsplit('/').next().unwrap();
        assert!(
            !base.starts_with(".wh."),
            "{name}: a layer removes a file of another"
        );
        let header = entry.header();
        let mut file = File {
            mode: header.mode().unwrap(),
            uid: header.uid().unwrap(),
            gid: header.gid().unwrap(),
            kind: header.entry_type(),
            link: entry
                .link_name()
                .unwrap()
                .map(|link| link.to_str().unwrap().to_owned()),
            content: Vec::new(),
            layer,
        };
        entry.read_to_end(&mut file.content).unwrap();
        let before = files.insert(name.to_owned(), file);
        overwritten += before.map_or(0, |file| file.content.len() as u64);
    }
    overwritten
}

impl Image {
    #[track_caller]
    pub fn file(&self, path: &str) -> &File {
        self.files
            .get(path.trim_start_matches('/'))
            .unwrap_or_else(|| {
                panic!(
                    "no {path} among {:?}",
                    self.files.keys().take(40).collect::<Vec<_>>()
                )
            })
    }

    /// The part of all bytes in layers that is seen in the end.
    pub fn efficiency(&self) -> f64 {
        let seen = self.unpacked();
        seen as f64 / (seen + self.overwritten) as f64
    }

    /// Bytes of all files.
    pub fn unpacked(&self) -> u64 {
        self.files
            .values()
            .map(|file| file.content.len() as u64)
            .sum()
    }
}

/// What the loader and a scanner see in a binary.
pub struct Binary {
    /// `e_machine`.
    pub machine: elf::Machine,
    /// The path of a loader.
    pub interpreter: bool,
    /// The libraries that it wants.
    pub needed: Vec<String>,
    /// The names of the crates that it is made of.
    pub crates: Vec<String>,
    pub has_symbols: bool,
}

impl Binary {
    pub fn of(content: &[u8]) -> Self {
        let file = ElfFile64::<Endianness>::parse(content).expect("an ELF file for 64 bits");
        let (header, endian) = (file.elf_header(), file.endian());
        let segments = header.program_headers(endian, content).unwrap();
        // Names are in the table of strings that belongs to the dynamic section.
        let sections = header.sections(endian, content).unwrap();
        let needed = match sections.dynamic(endian, content).unwrap() {
            None => Vec::new(),
            Some((entries, strings)) => {
                let strings = sections.strings(endian, content, strings).unwrap();
                entries
                    .iter()
                    .filter(|entry| entry.tag(endian) == elf::DT_NEEDED)
                    .map(|entry| {
                        String::from_utf8_lossy(entry.string(endian, strings).unwrap()).into_owned()
                    })
                    .collect()
            }
        };
        let list = auditable_info::audit_info_from_slice(content, usize::MAX)
            .expect("cargo-auditable's list of crates");
        let crates = list.packages.into_iter().map(|package| package.name);
        Self {
            machine: header.e_machine(endian),
            interpreter: segments
                .iter()
                .any(|segment| segment.p_type(endian) == elf::PT_INTERP),
            needed,
            crates: crates.collect(),
            has_symbols: file.symbols().next().is_some(),
        }
    }
}
