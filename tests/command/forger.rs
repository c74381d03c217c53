//! Forges objects in a store, with all checks right: the bytes that anyone with write access to its
//! files, or another version of the program, could put there.

use std::path::{Path, PathBuf};

use stillframe::codec::Codec;
use stillframe::{CaptureOptions, Hash, Store};

/// Adds objects to the only pack of a store that no process has open.
pub(crate) struct Forger {
    pub(crate) path: PathBuf,
    pack: Vec<u8>,
}

impl Forger {
    /// A store with one snapshot of zeros in the directory.
    pub(crate) fn new(dir: &Path) -> Forger {
        let store = dir.join("store");
        let memory = vec![0u8; 40_000];
        Store::options()
            .codec(Codec::None)
            .create(&store)
            .unwrap()
            .process("p")
            .capture(&memory, &CaptureOptions::default())
            .unwrap();
        std::fs::remove_dir_all(store.join("index")).unwrap();
        let path = store.join("packs/00000001.pack");
        Forger { pack: std::fs::read(&path).unwrap(), path }
    }

    /// The plain bytes of the first object of a kind.
    pub(crate) fn plain(&self, kind: u8) -> Vec<u8> {
        let mut at = 64;
        loop {
            let header = &self.pack[at..];
            let stored = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
            if header[0] == kind {
                assert_eq!(header[1], 0, "it is stored raw");
                return header[48..48 + stored].to_vec();
            }
            at += (48 + stored).next_multiple_of(8);
        }
    }

    /// Adds a compressed object and returns its hash.
    pub(crate) fn add(&mut self, kind: u8, plain: &[u8]) -> Hash {
        let payload = zstd::bulk::compress(plain, 1).unwrap();
        let (encoding, payload) =
            if payload.len() < plain.len() { (2, payload) } else { (0, plain.to_vec()) };
        let hash = Hash::of(plain);
        let mut object = vec![kind, encoding, 0, 0];
        object.extend(u32::try_from(plain.len()).unwrap().to_le_bytes());
        object.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        object.extend([0; 4]);
        object.extend(hash.0);
        object.extend(payload);
        object.resize(object.len().next_multiple_of(8), 0);
        let place =
            [&self.pack[16..32], &self.pack[12..16], &(self.pack.len() as u64).to_le_bytes()].concat();
        let place = crc32c::crc32c(&place);
        let (whole, header) = (crc32c::crc32c(&object), crc32c::crc32c(&object[..48]));
        object[2..4].copy_from_slice(&((header ^ place) as u16).to_le_bytes());
        object[12..16].copy_from_slice(&(whole ^ place).to_le_bytes());
        self.pack.extend(object);
        hash
    }

    pub(crate) fn write(&self) {
        std::fs::write(&self.path, &self.pack).unwrap();
    }
}
