//! Message contents that both languages can compute: `rustpeer.Content` is the Go half.

/// The `index`-th message of the run `seed`: `size` bytes of a splitmix64 stream, words little-endian.
pub fn content(seed: u64, index: u64, size: usize) -> Vec<u8> {
    let mut state = seed ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mut out = Vec::with_capacity(size + 7);
    while out.len() < size {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        out.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    out.truncate(size);
    out
}

/// SHA-256 in lower-case hex.
pub fn sha256(data: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(data))
}
