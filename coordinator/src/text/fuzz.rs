//! Fuzz target of what texts become: tokens, tokens text again, and that text ended at stop strings; and of chats rendered.

use std::{path::Path, sync::LazyLock, time::SystemTime};

use baton_checkpoint::{GgmlTokenizer, TokenKind};
use tokenizers::Tokenizer as Tables;

use super::{fast::Fast, pieces::Memo, *};
use crate::fuzz::expand;

/// Texts of more than 4 KiB are cut, and pieces from 2 KiB on kept.
const TEXT_BYTES_MOST: usize = 12 << 10;
const SPLITS: [&str; 5] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"];
/// Written as published tables have them: ids follow the 256 bytes.
const MERGES: [[&str; 2]; 22] = [
    ["t", "h"],
    ["th", "e"],
    ["Ġ", "the"],
    ["i", "n"],
    ["in", "g"],
    ["Ġ", "Ġ"],
    ["ĠĠ", "ĠĠ"],
    ["Ċ", "Ċ"],
    ["Ġ", "Ċ"],
    ["a", "b"],
    ["ab", "ab"],
    ["abab", "abab"],
    ["1", "2"],
    ["12", "3"],
    ["'", "s"],
    ["Ġ", "'s"],
    ["ä", "¸"],
    ["ä¸", "Ń"],
    ["Ã", "©"],
    ["é", "Ã"],
    ["<", "|"],
    ["|", ">"],
];
const SPECIAL: [(&str, TokenKind); 4] = [
    ("<|im_start|>", TokenKind::Control),
    ("<|im_end|>", TokenKind::Control),
    ("<|end|>", TokenKind::Control),
    ("<tool call>", TokenKind::UserDefined),
];
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
                      + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// What templates of all kinds do with what clients say.
const BUSY: &str = "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'system' and not loop.first \
                    %}{{ raise_exception('system comes first: ' + m.content) }}{% endif %}{% set ns.last = m.content %}{{ \
                    m.content.strip() | upper }}{{ m.content.split('\\n')[0][:9] }}{{ m['content'].replace('a', 'bb') }}{% if \
                    '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{{ m.content | \
                    tojson }}{% endfor %}{{ ns.last | length }}{{ strftime_now('%d %b %Y') }}";

/// A tokeniser of single bytes, a few merges and a few special tokens.
pub(crate) fn small_tables(splits: &str) -> GgmlTokenizer {
    let (mut tokens, mut moved) = (Vec::new(), 0x100..);
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { u32::from(byte) } else { moved.next().expect("endless") };
        tokens.push(char::from_u32(code).expect("a character").to_string());
    }
    let mut kinds = vec![TokenKind::Normal; tokens.len() + MERGES.len()];
    tokens.extend(MERGES.iter().map(|pair| pair.concat()));
    let bos = tokens.len() as u32 + 2;
    for (token, kind) in SPECIAL {
        tokens.push(token.to_owned());
        kinds.push(kind);
    }
    GgmlTokenizer {
        model: "gpt2".to_owned(),
        pre: splits.to_owned(),
        tokens,
        kinds,
        merges: MERGES.iter().map(|pair| pair.join(" ")).collect(),
        scores: Vec::new(),
        bos: Some(bos),
        eos: Some(bos),
        unknown: None,
        padding: None,
        add_bos: None,
        add_eos: None,
        add_space_prefix: None,
    }
}

fn clock() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

/// A model's text side, of that tokeniser and the ChatML template.
pub(crate) fn small_model(splits: &str, cache: &Arc<TextCache>) -> CheckpointText {
    let (tokenizer, texts) = Tokenizer::of_ggml(&small_tables(splits), Path::new("small"), cache)
        .unwrap_or_else(|error| panic!("{error}"));
    let template = ChatTemplate::new(CHATML, None, None, clock).expect("compiles");
    CheckpointText { tokenizer, template: Some(template), texts: Arc::new(texts) }
}

struct Both {
    tables: Tables,
    /// Without a cache, and with one.
    fast: [Fast; 2],
    texts: Arc<TokenTexts>,
}

static ALL: LazyLock<[Both; 5]> = LazyLock::new(|| {
    SPLITS.map(|splits| {
        let built = ggml::build(&small_tables(splits)).unwrap_or_else(|error| panic!("{error}"));
        let fast = [0, 64 << 10].map(|bytes| {
            Fast::of(&built.tables, Memo::new(TextCache::new(bytes)))
                .unwrap_or_else(|why| panic!("{splits}: {why}"))
        });
        Both { tables: built.tables, fast, texts: Arc::new(built.texts) }
    })
});

static TEMPLATES: LazyLock<[ChatTemplate; 2]> = LazyLock::new(|| {
    [CHATML, BUSY].map(|source| ChatTemplate::new(source, None, None, clock).expect("compiles"))
});

/// The first byte says what is done with the rest.
pub fn text(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let (kind, which) = (first % 8, &ALL[usize::from(first / 8) % ALL.len()]);
    match kind {
        0..=3 => tokenised(which, &String::from_utf8_lossy(&expand(rest, TEXT_BYTES_MOST))),
        4..=5 => read(which, rest),
        _ => rendered(rest),
    }
}

/// Token for token what `tokenizers` give, whatever is cached; and tokens are the text again.
fn tokenised(both: &Both, text: &str) {
    let Both { tables, fast, texts } = both;
    let theirs = tables.encode_fast(text, false).expect("encodes");
    let mut ours = Vec::new();
    for fast in fast.iter().chain(fast) {
        ours.clear();
        fast.encode(text, false, &mut ours);
        assert_eq!(ours, theirs.get_ids(), "{text:?}");
    }
    let cut = fast[1].remember(text);
    assert!(text.is_char_boundary(cut));
    if !text.contains('<') {
        let (mut parts, mut other) = (Vec::new(), Vec::new());
        fast[0].encode(&text[..cut], false, &mut parts);
        fast[0].encode(&text[cut..], false, &mut other);
        parts.append(&mut other);
        assert_eq!(parts, ours, "cut at {cut}: {text:?}");
        if tables.get_normalizer().is_none() {
            let bytes: Vec<u8> = ours.iter().flat_map(|&id| texts.get(id).to_vec()).collect();
            assert_eq!(bytes, text.as_bytes(), "nothing is lost");
        }
    }
}

/// Tokens, of which the first few bytes say how the answer ends, read one by one.
fn read(both: &Both, bytes: &[u8]) {
    let [flags, count, rest @ ..] = bytes else { return };
    let (mut strings, mut rest) = (Vec::new(), rest);
    for _ in 0..count % 4 {
        let Some((&length, behind)) = rest.split_first() else { return };
        let (string, behind) = behind.split_at(behind.len().min(usize::from(length % 16)));
        strings.push(String::from_utf8_lossy(string).into_owned());
        rest = behind;
    }
    let stops = TextStops::new(&strings, flags % 2 == 1, u32::from(flags / 2 % 8));
    // Most of them tokens of single bytes, in their own order; the others beyond.
    let tokens: Vec<u32> =
        rest.iter().map(|&byte| if byte < 224 { byte.into() } else { u32::from(byte) + 60 }).collect();
    let (shown, stopped) = naive(&both.texts, &tokens, &stops);
    let mut reader = Reader::new(Detokenizer::new(both.texts.clone()), &stops);
    let (mut text, mut ended) = (String::new(), false);
    for &token in &tokens {
        ended = reader.push(token, &mut text);
        assert!(shown.starts_with(&text), "{text:?} was shown of {shown:?}");
        if ended {
            break;
        }
    }
    if !ended {
        reader.finish(&mut text);
        ended = stopped;
    }
    assert_eq!((text.as_str(), ended), (shown.as_str(), stopped), "{stops:?} in {tokens:?}");
}

/// The same by its definition: the text of all tokens, up to the stop string that is complete first, of those complete at one
/// place the longest.
fn naive(texts: &TokenTexts, tokens: &[u32], stops: &TextStops) -> (String, bool) {
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    for &token in tokens {
        bytes.extend_from_slice(texts.get(token));
        ends.push(certain(&bytes));
    }
    let whole = String::from_utf8_lossy(&bytes).into_owned();
    ends.push(whole.len());
    let mut from = 0;
    for (index, end) in ends.into_iter().enumerate() {
        let number = (index + 1).min(tokens.len()) as u32;
        for at in from + 1..=end {
            let complete = |stop: &&str| whole.as_bytes()[..at].ends_with(stop.as_bytes());
            if number > stops.min_tokens
                && let Some(stop) = stops.strings().filter(complete).max_by_key(|stop| stop.len())
            {
                return (whole[..if stops.included { at } else { at - stop.len() }].to_owned(), true);
            }
        }
        from = end;
    }
    (whole, false)
}

/// How long the text is of the characters that are whole, or can never be.
fn certain(bytes: &[u8]) -> usize {
    let (mut length, mut chunks) = (0, bytes.utf8_chunks().peekable());
    while let Some(chunk) = chunks.next() {
        length += chunk.valid().len();
        let tail = chunk.invalid();
        // What comes behind it shows that a character will never be whole.
        let unfinished = chunks.peek().is_none()
            && std::str::from_utf8(tail).is_err_and(|error| error.error_len().is_none());
        length += if tail.is_empty() || unfinished { 0 } else { char::REPLACEMENT_CHARACTER.len_utf8() };
    }
    length
}

/// A chat, messages parted by 0xff, of which each begins with its role: rendered as it is said, by a template that repeats it.
fn rendered(bytes: &[u8]) {
    let said: Vec<(&str, Arc<str>)> = bytes
        .split(|&byte| byte == 0xff)
        .filter_map(|message| {
            let (&role, content) = message.split_first()?;
            let role = ["system", "user", "assistant"][usize::from(role) % 3];
            Some((role, String::from_utf8_lossy(&expand(content, TEXT_BYTES_MOST)).into()))
        })
        .collect();
    let messages: Vec<ChatMessage<'_>> =
        said.iter().map(|(role, content)| ChatMessage { role, content: content.clone() }).collect();
    let [plain, busy] = &*TEMPLATES;
    let mut expected: String =
        said.iter().map(|(role, content)| format!("<|im_start|>{role}\n{content}<|im_end|>\n")).collect();
    expected.push_str("<|im_start|>assistant\n");
    assert_eq!(
        plain.render(&messages, &Variables::new()).unwrap_or_else(|error| panic!("{error}")),
        expected
    );
    let said_bytes: usize = said.iter().map(|(_, content)| content.len()).sum();
    match busy.render(&messages, &Variables::new()) {
        Ok(text) => assert!(text.len() <= 32 * (said_bytes + 64), "{} bytes", text.len()),
        Err(TextError::Refused { .. }) => assert!(said.len() > 1),
        // It ran out of fuel.
        Err(TextError::Render(_)) if said_bytes > 32 << 10 => {}
        Err(error) => panic!("{error}"),
    }
}
