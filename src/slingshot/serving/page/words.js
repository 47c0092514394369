// What the page says, in its two languages. word("send"), word("tokens", 12)

const WORDS = {
  en: {
    skip: "Skip to the question", new: "New chat", search: "Search conversations", conversations: "Conversations",
    import: "Import", export: "Export", language: "日本語", theme: "Light or dark", model: "Model", beside: "Beside",
    nothing: "nothing", reasoning: "Reasoning", budget: "Budget", free: "free", glass: "Glass box", ask: "Ask something",
    thread: "Conversation", send: "Send", stop: "Stop", now: "Answer now", copy: "Copy", edit: "Edit", again: "Again",
    remove: "Delete", rename: "Rename", removed: (title) => `“${title}” is deleted.`, undo: "Undo", copied: "Copied", save: "Send", cancel: "Cancel", earlier: "Earlier version", later: "Later version", thinking: "Thinking",
    thought: (seconds, tokens) => `Thought for ${seconds} s${tokens == null ? "" : `, ${tokens} tokens`}`, stopped: "stopped", cut: "cut at the length limit",
    rate: (tokens, speed, first) => `${tokens} tokens, ${speed} tokens/s, first after ${first} s`, cached: (n) => `${n} from the cache`,
    unfinished: "This answer was cut off before it was whole.", resume: "Ask again",
    fine: "Conversations stay in this browser. Enter sends, Esc stops, Ctrl+K searches, Ctrl+Shift+O begins anew.",
    effort: { auto: "as the model does", none: "none", low: "low", high: "high", max: "max" },
    opened: "Look inside: every token, its alternatives, its experts", look: "Inside", probability: "probability", instead: "Instead",
    experts: "Experts by layer", none_else: "nothing else was likely", prompt: "Every question stands alone for this model.", example: "Try:",
    tokens: "tokens", load: "Load of the experts, brighter is busier", fails: "The server does not answer.", full: "This browser keeps no more: export and delete conversations.",
    price: (money) => `this conversation: ${money}`, again_inside: "Asked again with the same seed, so that the same tokens come.",
    from_cache: (hit, all) => `Prompt: ${hit} of ${all} tokens came from the cache${hit ? " (underlined)" : ""}`, later_on: (seconds) => `Ask again in ${seconds} s.`,
    unsure: "Redder is less sure.", drafted: "drafted",
    drafts: (drafted, all) => `Dotted: ${drafted} of ${all} tokens were drafted, guessed ahead and confirmed.`,
    system: "Instructions for the whole conversation (optional)", key: "Key", key_wanted: "This server asks for a key.", key_kept: "It stays in this browser.", use: "Use", none_found: "Nothing found.", retry: "Try again", menu: "Menu",
  },
  ja: {
    skip: "質問欄へ", new: "新しい会話", search: "会話を検索", conversations: "会話", import: "読み込む", export: "書き出す",
    language: "English", theme: "明るさ", model: "モデル", beside: "比較", nothing: "なし", reasoning: "思考", budget: "思考の上限",
    free: "なし", glass: "ガラス箱", ask: "質問を入力", thread: "会話", send: "送信", stop: "停止", now: "今すぐ回答", 
    copy: "コピー", edit: "編集", again: "もう一度", remove: "削除", rename: "名前を変える", removed: (title) => `「${title}」を削除しました。`, undo: "元に戻す", copied: "コピーしました", save: "送信", cancel: "やめる", earlier: "前の版", later: "次の版",
    thinking: "思考中", thought: (seconds, tokens) => `思考: ${seconds}秒${tokens == null ? "" : `、${tokens}トークン`}`, stopped: "停止しました", cut: "長さの上限で切れました",
    rate: (tokens, speed, first) => `${tokens}トークン、毎秒${speed}トークン、最初まで${first}秒`, cached: (n) => `${n}はキャッシュから`,
    unfinished: "この回答は途中で切れています。", resume: "もう一度聞く",
    fine: "会話はこのブラウザーにだけ残ります。Enterで送信、Escで停止、Ctrl+Kで検索、Ctrl+Shift+Oで新しい会話。",
    effort: { auto: "モデルに任せる", none: "なし", low: "少し", high: "十分", max: "最大" },
    opened: "中を見る: トークン、代わりの候補、エキスパート", look: "中を見る", probability: "確率", instead: "代わりの候補",
    experts: "層ごとのエキスパート", none_else: "ほかの候補はほとんどありません", prompt: "このモデルでは質問は一つずつ独立しています。", example: "例:",
    tokens: "トークン", load: "エキスパートの負荷(明るいほど多い)", fails: "サーバーが応答しません。", full: "このブラウザーにはもう保存できません。会話を書き出して削除してください。",
    price: (money) => `この会話: ${money}`, again_inside: "同じシードで聞き直すので、同じトークンになります。",
    from_cache: (hit, all) => `プロンプト: ${all}トークンのうち${hit}はキャッシュから${hit ? "(下線)" : ""}`, later_on: (seconds) => `${seconds}秒後にもう一度お試しください。`,
    unsure: "赤いほど自信がありません。", drafted: "下書き",
    drafts: (drafted, all) => `点線: ${all}トークンのうち${drafted}は先に予想され、確かめられたもの(下書き)です。`,
    system: "会話全体への指示(任意)", key: "キー", key_wanted: "このサーバーにはキーが必要です。", key_kept: "キーはこのブラウザーにだけ残ります。", use: "使う", none_found: "見つかりません。", retry: "再試行", menu: "メニュー",
  },
};

let language = localStorage.getItem("language") || (navigator.language.startsWith("ja") ? "ja" : "en");

export function word(name, ...values) {
  const found = WORDS[language][name];
  return typeof found === "function" ? found(...values) : found;
}

export function setLanguage(next) {
  language = next ?? (language === "en" ? "ja" : "en");
  localStorage.setItem("language", language);
  sayAll();
}

// Fill in what index.html leaves open.
export function sayAll() {
  document.documentElement.lang = language;
  /** @type {(name: string) => NodeListOf<any>} */
  const open = (name) => document.querySelectorAll(`[data-${name}]`);
  for (const element of open("word")) element.textContent = word(element.dataset.word);
  for (const element of open("placeholder")) element.placeholder = word(element.dataset.placeholder);
  for (const element of open("title")) element.title = word(element.dataset.title);
  for (const element of open("label")) element.setAttribute("aria-label", word(element.dataset.label));
  document.querySelector("#language").textContent = word("language");
}
