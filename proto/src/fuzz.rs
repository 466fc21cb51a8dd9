//! What the target `wire` in `integration-tests/fuzz` calls: messages of the services to each other, from their bytes to what the
//! others work with. Whatever is taken has its bounds, and says the same when it is written and read again.

use std::fmt::Debug;

use prost::Message;

use crate::*;

const NAME_BYTES_MOST: usize = 63;

/// The first byte says what the rest is.
pub fn wire(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind % 16 {
        0 => again::<v1::InstanceSpec, InstanceSpec>(rest, |spec| {
            name(spec.id.as_str());
            name(spec.group.as_str());
            assert!(!spec.model.name.is_empty() && !spec.inference_endpoint.is_empty());
        }),
        1 => again::<v1::InstanceLoad, InstanceLoad>(rest, |_| {}),
        2 => again::<v1::CoordinatorSpec, CoordinatorSpec>(rest, |spec| {
            name(spec.id.as_str());
            assert!(
                spec.models.len() <= MODELS_MOST && spec.models.iter().all(|model| !model.names.is_empty())
            );
        }),
        3 => again::<v1::CoordinatorBeat, CoordinatorBeat>(rest, |beat| {
            assert!(beat.links.len() <= LINKS_MOST);
            beat.links.iter().for_each(|link| name(link.decode.as_str()));
        }),
        4 => again::<v1::Intent, Intent>(rest, |intent| {
            assert!(intent.pinned.as_ref().is_none_or(|pinned| pinned.role != Role::None));
        }),
        5 => again::<v1::Targets, Targets>(rest, |targets| drop(targets.to_string())),
        6 => again::<v1::ApiKey, ApiKey>(rest, |key| {
            name(key.name.as_str());
            name(key.tenant.as_str());
            assert_eq!(KeyHash::from_hex(&key.hash.to_hex()), Some(key.hash));
        }),
        7 => again::<v1::ErrorDetail, ApiError>(rest, |error| {
            assert!(error.message.len() <= ApiError::MESSAGE_BYTES_MOST);
            let status = tonic::Status::from(error.clone());
            assert_eq!((status.code(), status.message()), (error.code.grpc(), &*error.message));
        }),
        8 => again::<v1::KvLayout, KvLayoutSpec>(rest, |layout| drop(layout.handover_class().to_owned())),
        9 => tokens_and_hashes(rest),
        10 => names(&String::from_utf8_lossy(rest)),
        // All other messages, as gRPC decodes them: what was decoded is what is encoded again.
        11 => same::<v1::AttachRequest>(rest),
        12 => same::<v1::KvEvents>(rest),
        13 => same::<v1::InstanceReport>(rest),
        14 => same::<v1::SenderMessage>(rest),
        _ => same::<v1::PlanResponse>(rest),
    }
}

/// Reads, writes and reads again.
fn again<W, T>(bytes: &[u8], check: impl FnOnce(&T))
where
    W: Message + Default + From<T>,
    T: TryFrom<W, Error: Debug> + Clone + PartialEq + Debug,
{
    let Ok(wire) = W::decode(bytes) else { return };
    let Ok(value) = T::try_from(wire) else { return };
    check(&value);
    let written = W::from(value.clone()).encode_to_vec();
    let wire = W::decode(&written[..]).expect("what was written can be read");
    assert_eq!(T::try_from(wire).expect("and taken"), value);
}

fn same<W: Message + Default + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(wire) = W::decode(bytes) else { return };
    let written = wire.encode_to_vec();
    assert_eq!(written.len(), wire.encoded_len());
    let read = W::decode(&written[..]).expect("what was written can be read");
    // Not a number is none that equals itself.
    assert_eq!(read.encode_to_vec(), written);
}

fn name(name: &str) {
    let plain = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    assert!(!name.is_empty() && name.len() <= NAME_BYTES_MOST && name.bytes().all(plain), "{name:?}");
}

fn tokens_and_hashes(bytes: &[u8]) {
    assert_eq!(tokens::from_wire(bytes).is_ok(), bytes.len().is_multiple_of(4));
    if let Ok(tokens) = tokens::from_wire(bytes) {
        let tokens = Tokens::from(tokens);
        assert_eq!(tokens.to_wire(), bytes);
        let digest = PromptDigest::of(&tokens);
        assert_eq!(PromptDigest::try_from(&digest.as_bytes()[..]), Ok(digest));
    }
    assert_eq!(TransferId::try_from(bytes).is_ok(), bytes.len() == TransferId::LEN);
    assert_eq!(PromptDigest::try_from(bytes).is_ok(), bytes.len() == PromptDigest::BYTES);
    let Ok(hashes) = BlockHash::from_wire(bytes) else {
        assert!(!bytes.len().is_multiple_of(BlockHash::BYTES));
        return;
    };
    let hashes: Vec<BlockHash> = hashes.collect();
    assert_eq!(BlockHash::to_wire(&hashes), bytes);
    // What is told of one block in so many: of all blocks all, and of none others than asked for.
    let (every, tokens) = (hashes.len() as u32 * 16, bytes.first().copied().unwrap_or(0).into());
    let sieve = Sieve::new(every, tokens);
    let kept: Vec<_> = sieve.of(&hashes).collect();
    assert!(kept.len() <= hashes.len() && kept.iter().all(|hash| sieve.keeps(hash.key())));
    assert_eq!(Sieve::ALL.of(&hashes).count(), hashes.len());
    assert!(
        hashes.iter().all(|hash| hash.key() & 0xff != 0 || sieve.keeps(hash.key())),
        "the first is told of"
    );
}

fn names(text: &str) {
    if let Ok(id) = InstanceId::new(text) {
        name(id.as_str());
        assert_eq!(id.as_str(), text);
    }
    let request = RequestId::adopt(text);
    assert!(request.as_str().len() <= 128 && request.as_str().bytes().all(|byte| byte.is_ascii_graphic()));
    assert_eq!(RequestId::adopt(request.as_str()), request);
    if let Some(hash) = KeyHash::from_hex(text) {
        assert_eq!(hash.to_hex(), text.to_ascii_lowercase());
    }
    let error = ApiError::new(ErrorCode::Internal, text).param(text);
    assert!(error.message.len() <= ApiError::MESSAGE_BYTES_MOST);
    assert!(error.param.is_some_and(|param| param.len() <= ApiError::MESSAGE_BYTES_MOST));
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_is_taken() {
        baton_fuzz::replay("wire", super::wire);
    }
}
